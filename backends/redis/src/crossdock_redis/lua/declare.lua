-- Makes a queue known and sets what was declared for it.
--
-- KEYS[1]      prefix of the queue
-- ARGV         lease in ms, max_ready, dead_max_age in ms, dead_max_count; '' = not set
-- returns      1

local fields = {'lease_ms', 'max_ready', 'dead_max_age_ms', 'dead_max_count'}
redis.call('HDEL', P .. 'q', unpack(fields))       -- needs no memory, and lets the rest through when that is full
for i, field in ipairs(fields) do
  if ARGV[i] ~= '' then redis.call('HSET', P .. 'q', field, ARGV[i]) end
end
redis.call('HSET', P .. 'q', 'named', 1)
return 1
