"""Pictures of a search, in the users' own values: what a sweep shows of itself."""

from ftd_ray.pictures.places import short_names
from ftd_ray.pictures.sheet import caption, contact_sheet
from ftd_ray.pictures.study import study_pictures

__all__ = ["caption", "contact_sheet", "short_names", "study_pictures"]
