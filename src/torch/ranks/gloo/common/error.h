// Included by c10d's header, which uses no declaration of it.
#pragma once
