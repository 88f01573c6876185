"""embedded:scenes-blip2 and embedded:scenes-blip2-itm: their architecture, their training, and their model cards."""
