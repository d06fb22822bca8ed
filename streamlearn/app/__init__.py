"""Builds every part from a Config, runs them, and stops them in order. The only package that knows every other.

`learning` is the learner's process, `serving` one server process, `supervising` the parent of both (`streamlearn run`).
They share nothing but the log and the state folder, whose layout is in `wiring`.
"""
