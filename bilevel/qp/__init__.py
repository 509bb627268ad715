"""Small quadratic programs, exactly: the active set of a strictly convex one, and the point nearest to a polyhedron."""
