"""From the user's own files to a log: the parts of `rankjax.data.importer`."""
