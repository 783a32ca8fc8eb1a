"""The pages for Prometheus: tables of series, what fills them, the server."""
