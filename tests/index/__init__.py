"""The seam: what any Index must do, and Indexes that tests steer by hand."""
