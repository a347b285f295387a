"""The service: accounts, uploads, a durable queue, workers, the HTTP API, the page and its Python client (docs/service.md)."""
