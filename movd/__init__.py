"""MOVD: text to video with Open-Sora v1.2 on the blockstream engine."""
