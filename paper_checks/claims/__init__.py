"""The claims, one file per topic; `paper_checks.framework.registry.SECTIONS` lists the files."""
