# For those who have make: every target is the command of ./runbook with the same name.
TARGETS := demo demo-down setup lint format test bench bench-backup lock

.PHONY: help $(TARGETS)
help:
	@./runbook --help
$(TARGETS):
	@./runbook $@
