"""The steps of the workflow as functions: files in, files out.

Imported one by one, because each needs other libraries and starts sooner without the rest.
"""
