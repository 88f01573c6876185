"""embedded:scenes-llava: its architecture, its training, and its model card."""
