"""Looking at servers that run: `client` asks one, `window` makes rates of what it tells, `panel`
and `table` show it.
"""
