// Declarations that c10d's header of its Gloo back end names. LibTorch holds Gloo itself, without its headers.
#pragma once
