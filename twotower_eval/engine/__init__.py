"""Operations, models, decoders and scorers, in torch. Nothing here knows a plan, a run folder or lm-eval."""
