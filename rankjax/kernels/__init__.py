"""Attention kernels: one folder each, with one public function and several implementations."""
