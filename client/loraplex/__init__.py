"""What other services import to talk to Loraplex."""
