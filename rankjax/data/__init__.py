"""From what happened (a log on disk) to batches: event_log -> samples -> loader, and the sources."""
