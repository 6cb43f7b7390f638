"""`hobbit serve`: a model behind OpenAI's and llama-server's HTTP interfaces.

From the inside out: `answer` runs one generation, `engine` owns the one thread that does so, taking
turns from `turns`; `exchange` is a request's way through it as the event loop sees it; `openai`,
`native` and `info` are the endpoints, `app` puts them together, `server` runs them.
"""
