"""Does a runtime compute what the plan says?"""
