"""The pages that crcjax writes: one template, figures as SVG, tables, and the step from a page to a PDF."""
