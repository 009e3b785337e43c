"""modsquad_ds: one sparse vision transformer that learns many tasks from differently labelled datasets."""

__version__ = "0.1.0"
