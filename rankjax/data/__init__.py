"""From what happened to batches: columns -> event_log -> samples -> loader, and the sources."""
