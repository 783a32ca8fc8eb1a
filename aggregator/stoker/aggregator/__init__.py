"""The aggregator: it knows the fleet, places requests and keeps the ledger."""
