"""Drop-ins for those who come from elsewhere: their routes and bodies, our mathematics."""
