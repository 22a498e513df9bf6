"""Secure aggregation: the server learns the sum of a group's rows, and no row.

Bonawitz et al. 2017 ("Practical secure aggregation for privacy-preserving machine learning") with both masks and the
recovery of drop-outs, in groups; with the sparse neighbour graph of Bell et al. 2020 where `Terms.degree` asks for it.
No sockets, threads or clocks: messages go in, messages come out.

What it protects against. A server that keeps to the protocol and is curious, together with up to threshold - 1 clients
among those who hold a client's shares: they learn the sum over the survivors of a group (so, with their own rows taken
off, the sum over its honest survivors) and nothing else of any row. A sum covers at least `threshold` rows. With a
neighbour graph that holds where the honest survivors stay connected in it (Bell et al. 2020 say how large a degree that
takes); if they fell apart, the sum of each part would be learnt. The session draws the graph, and the server the
session.

What a server that breaks the protocol can do. A client answers one list of survivors, gives either share of a client
and never both, and more than half of the holders must answer alike: so that no row is unmasked by contradictory lists,
while fewer than 2 * threshold - holders of the holders collude with it. In an unsigned session (`Terms.signed` off) the
server could still show different clients different lists, and come to a sum of fewer than `threshold` rows, or make up
the keys of all the other clients and so learn a row. Signed, with keys that clients know of each other beforehand and
not from the server, advertised keys and the list of survivors carry Ed25519 signatures, and no share is given before
`threshold` holders have signed the same list: that is the paper's consistency check. A server that chooses the members
can still choose its own accomplices, and may ask for several sums: neither is hidden here, nor what a sum itself tells
(that is what differential privacy is for).

What a client that breaks the protocol can do. It can send any row: the server sees no norms, no values that are not
finite, no distances, so that no check, screen or weigher sees a single update. What can be bounded is a group's sum
(`Grid.decode`), and robust rules can reduce across the groups' sums. It can also spoil its own group, by shares that do
not open; that group's sum is lost, the others' are not.

Not claimed: constant time, or that secrets are wiped from memory.
"""
