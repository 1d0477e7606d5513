"""A thin asyncio client of etcd: key-value, transactions, leases, watches and a fenced election."""
