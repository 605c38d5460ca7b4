"""The developer's and the demo's tools: everything that ./runbook does. Not part of the runbook itself."""
