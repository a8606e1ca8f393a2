"""A teacher for students on other machines: its targets and answers over HTTP."""
