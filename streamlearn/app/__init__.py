"""The processes: `learner`, `server`, and `supervisor`, the parent of both (`streamlearn run`).

Each builds its parts from a Config, runs them, and stops them in order. Processes share only the log and the state
folder (`state/paths.py`).
"""
