"""Operations that deserve their own implementations; they know nothing of OneFormer."""
