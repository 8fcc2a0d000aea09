"""models/rave"""
