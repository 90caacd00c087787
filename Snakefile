# The entry for a Snakemake that is called in this folder; all of it stands in workflow/Snakefile.
include: "workflow/Snakefile"


workflow.default_target = "all"  # an include leaves the default target as it was
