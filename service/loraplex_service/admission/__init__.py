"""Who may go on: so many requests of a model, so many tokens and so many calls of a tenant."""
