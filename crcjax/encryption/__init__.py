"""Encryption at rest: framed AES-256-GCM files, and the keys that wrap their keys."""
