"""Operations with their own implementations; they know nothing of OneFormer."""
