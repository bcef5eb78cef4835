"""Key-value stores through which ranks find each other. `base.Store` says what each can do."""
