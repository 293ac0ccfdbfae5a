"""The REST API and the web console: a thin skin over the keeper, its jobs and the service's functions.

server      listens on the local socket and, with TLS, on the network
tls         the certificate that is made at the first start
app         the application: routers, errors, headers
gate        who asks, what the call needs, and the audit of it
orders      what calls ask for, as commands of hvbackup
machines, stores, upkeep, work, people     the routes
timeline    what of a machine can be recovered, quickly
pages       the console
scrape      metrics

FastAPI and what it needs are imported here and nowhere else.
"""
