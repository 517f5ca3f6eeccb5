"""An HTTP service over bundles. No torch."""
