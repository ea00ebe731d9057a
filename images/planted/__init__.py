"""The shipped client with one safety step taken out each: what the suite must catch.

Each file patches the client from outside and then runs it; the client itself has no test hooks.
"""
