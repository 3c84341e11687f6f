-- Makes a queue disappear with all that is in it.
--
-- KEYS[1]      prefix of the queue
-- KEYS[2..]    all keys of it that have no token in their names
-- returns      1

for _, member in ipairs(redis.call('ZRANGE', P .. 'x', 0, -1)) do redis.call('UNLINK', P .. 'g' .. batch_of(member)) end
redis.call('UNLINK', unpack(KEYS, 2))
return 1
