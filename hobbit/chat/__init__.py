"""The chat: `session` holds the conversation, `commands` the words that begin with a slash, `view`
the live numbers, `screen` the terminal, and `loop` joins them."""
