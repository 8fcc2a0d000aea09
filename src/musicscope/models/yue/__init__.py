"""models/yue"""
