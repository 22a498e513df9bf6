"""The round: the wire, the device's half, the server's half, the coordinator. No socket, thread or clock."""
