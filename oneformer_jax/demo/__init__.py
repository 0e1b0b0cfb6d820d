"""A page in the browser that segments images: `page.serve`."""
