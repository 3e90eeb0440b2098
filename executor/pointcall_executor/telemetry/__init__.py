"""What the executor says about itself to monitoring: metrics, traces, health. Hears and counts; decides nothing.

Nothing here runs on the loop but one append to a bounded queue. Without the settings `http` and `otlp` nothing listens
and nothing is sent. Spec: docs/spec/metrics.md.
"""
