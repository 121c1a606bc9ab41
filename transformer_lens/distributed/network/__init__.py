"""How messages travel between machines: in pieces, from peer to peer, with signed records of who is there."""
