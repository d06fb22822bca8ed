"""The learner: student, teacher and the step that moves them. Nothing here knows a log, a label's life or a file."""
