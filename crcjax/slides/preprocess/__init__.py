"""The work of `crcjax tile`: slides to stores, the manifest, the quality-control report."""
