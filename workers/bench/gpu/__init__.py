"""Check and time everything that runs on a GPU, in calls of some minutes: `python -m workers.bench gpu --help`.

A parent process (`call`) starts a child that runs the cases of the stages one after the other and writes a line of JSON
for each as soon as it is known (`journal`). A child that dies or hangs costs the case it was at; the next one goes on.
"""
