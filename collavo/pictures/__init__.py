"""Pictures of panoptic maps and crayons, drawn as PNG or SVG by one code."""
