"""Operations on packed tensors. ``ref.py`` of each is its definition in plain torch."""
