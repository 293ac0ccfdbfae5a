"""NBD, the protocol in which every disk comes to us and every view leaves: a client and a server.

    client   NbdClient.open(uri, contexts=...), list_exports(uri), Settings
    server   NbdServer, Export (what is served), Limits
    names    NbdUri

Import the classes from their modules; see docs/decisions/0005-own-nbd.md for why this is our own.
"""
